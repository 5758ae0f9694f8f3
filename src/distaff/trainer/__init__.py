"""The class a user subclasses."""
