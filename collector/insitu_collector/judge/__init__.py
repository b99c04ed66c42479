"""`insitu judge`: rows in, incidents and revisions of verdicts out."""
