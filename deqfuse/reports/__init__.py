"""What a report is made of: tables, pictures, pages, the folder they go to. Knows no model."""
