"""From the user's rows to packed token rows: sources (read), rendering (text and mask), packing, and the store."""
