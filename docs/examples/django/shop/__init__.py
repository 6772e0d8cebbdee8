"""A Django project, of one application, whose orders are confirmed in the background."""
