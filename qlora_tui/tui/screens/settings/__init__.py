"""Settings of the app: ``screen`` changes them, ``commands`` are its keys, ``rows`` declares them."""
