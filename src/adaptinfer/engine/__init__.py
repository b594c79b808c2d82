"""The one room that knows transformers: prompt layout, layer hooks, scoring tap, caches and masks, families, report."""
