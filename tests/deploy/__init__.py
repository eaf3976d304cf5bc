"""Everything below `server/deploy` that no other folder of tests covers, and the distribution, as they are shipped."""
