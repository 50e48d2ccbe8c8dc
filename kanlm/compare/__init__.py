"""Plan arms of equal size, train and judge them under one protocol, write the report."""
