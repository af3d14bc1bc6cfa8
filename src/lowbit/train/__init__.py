"""See docs/design.md for what belongs in this room."""
