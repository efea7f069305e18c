"""Images and sounds to learn from: downloaded, made by code, or from folders of one's own."""
