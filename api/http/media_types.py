"""The media types of a body of the Store transaction (PS3.18 10.5.1)."""

DICOM = "application/dicom"
MULTIPART = "multipart/related"

ACCEPTED = (DICOM, f'{MULTIPART}; type="{DICOM}"')
"""As `Accept-Post` lists them."""
