"""Image towers that IDEFICS can read its pictures with."""
