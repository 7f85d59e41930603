"""Published annotations, in the forms that people have them, as one record type."""
