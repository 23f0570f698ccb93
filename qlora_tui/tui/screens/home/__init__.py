"""Home: ``screen``; ``reader`` gathers and formats what it shows; ``next_step`` suggests what to do."""
