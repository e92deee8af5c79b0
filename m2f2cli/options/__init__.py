"""What each verb can be told: every option once, with its help, range and default."""
