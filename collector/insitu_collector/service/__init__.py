"""`insitu collect`: connections, what is checked and stored, rules handed down."""
