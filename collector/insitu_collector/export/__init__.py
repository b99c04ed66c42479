"""`insitu export`: traces and tables for other programs (`docs/export.md`)."""
