"""From the internet to joined rows: sources, join, images, shards, schema, flows."""
