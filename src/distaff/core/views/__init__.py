"""Views of objects: short texts for `repr`, and HTML for notebooks."""
