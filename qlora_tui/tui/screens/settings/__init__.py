"""Settings of the app: ``screen`` changes them, ``rows`` declares them."""
