"""The page that judges pictures for people without a terminal."""
