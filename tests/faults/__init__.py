"""The fault lab: an upstream with faults, callers with faults, and a check of the contract on every call."""
