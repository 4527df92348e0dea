"""From the words of the user to one plain dictionary, and what a run is known by. No torch here."""
