"""Home: ``screen``; ``reader`` gathers what it shows, formats it, and suggests the next step."""
