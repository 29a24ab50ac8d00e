"""File formats: what a folder of an adapter holds, read and written for Infuse and for other libraries."""
