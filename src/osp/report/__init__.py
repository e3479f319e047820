"""Numbers -> what people read: tables, CSV, curves, contact sheets, parts of an HTML page, progress."""
