"""What a reader sees of it: tables, pictures, pages, and what changed between two reports."""
