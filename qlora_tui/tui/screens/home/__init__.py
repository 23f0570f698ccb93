"""Home: ``screen`` shows what ``reader`` gathers; ``next_step`` chooses what to suggest."""
