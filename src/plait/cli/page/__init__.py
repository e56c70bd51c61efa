"""The report that people open: one self-contained HTML page of sections, tables and charts."""
