"""What is taken: rules, their text and changes, and which steps, rows and bytes they come to."""
