"""Exemplars from a database: crops of known objects, embedded once and found again by likeness, class or words."""
