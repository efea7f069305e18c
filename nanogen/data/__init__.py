"""Pictures and sounds to learn from: two real data sets, two made by code, and folders of one's own."""
