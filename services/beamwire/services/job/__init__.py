"""The Job service: programs that the facility runs for somebody."""
