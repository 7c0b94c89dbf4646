"""Event sources, and the data sources that go with them."""
