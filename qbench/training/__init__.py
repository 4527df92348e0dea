"""One run from its dictionary to result.json: built, calibrated, trained, evaluated, written."""
