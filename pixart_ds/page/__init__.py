"""What pages for people are made of: figures in words, charts, tables, light and dark; nothing but the standard library."""
