"""Several gateways on one database, as processes: what one does, the others know, also when one of them is killed."""
