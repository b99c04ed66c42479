"""What rules would take and cost, before anything is switched on."""
