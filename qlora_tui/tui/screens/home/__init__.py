"""Home: ``screen``; ``reader`` gathers what it shows and formats it; ``next_step`` suggests what to do."""
