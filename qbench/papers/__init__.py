"""A paper's table or figure: the card, its runs, and the pages and pictures made of what is finished."""
