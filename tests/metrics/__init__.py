"""What the gateway measures, as a scraper sees it."""
