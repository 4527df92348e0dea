"""A trained net as a device would hold it: codes, tables and a description of both. It knows no method by name."""
