"""Pictures of the app, drawn by ``make screenshots`` from a recorded real run."""
