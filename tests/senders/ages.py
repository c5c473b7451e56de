"""The ages of clients that are tried here, beside the one that is installed."""

# With what each of them wants beside it and would not have from here.
PYPI: dict[str, dict[str, tuple[str, ...]]] = {
    "dicomweb-client (Python)": {
        "0.14.0": ("dicomweb-client==0.14.0", "pydicom==2.1.2"),
        "0.30.0": ("dicomweb-client==0.30.0", "pydicom==2.1.2"),
        "0.50.4": ("dicomweb-client==0.50.4", "pydicom==2.1.2"),
        "0.54.4": ("dicomweb-client==0.54.4", "pydicom==2.2.2"),
        "0.59.3": ("dicomweb-client==0.59.3", "pydicom==2.4.4"),
    },
    "requests": {
        "2.20.1": ("requests==2.20.1", "urllib3==1.24.3", "chardet==3.0.4", "idna==2.7"),
        "2.25.1": ("requests==2.25.1", "urllib3==1.26.20", "chardet==4.0.0", "idna==2.10"),
        "2.28.2": ("requests==2.28.2", "urllib3==1.26.20"),
        "2.31.0": ("requests==2.31.0", "urllib3==2.0.7"),
    },
    "httpx": {
        "0.18.2": (
            *("httpx==0.18.2", "httpcore==0.13.7", "h11==0.12.0", "anyio==3.7.1"),
            *("rfc3986==1.5.0", "sniffio==1.3.1"),
        ),
        "0.23.3": (
            *("httpx==0.23.3", "httpcore==0.16.3", "h11==0.14.0", "rfc3986==1.5.0"),
            *("anyio==3.7.1", "sniffio==1.3.1"),
        ),
        "0.25.2": ("httpx==0.25.2", "httpcore==1.0.9", "anyio==3.7.1", "sniffio==1.3.1"),
        "0.27.2": ("httpx==0.27.2", "httpcore==1.0.9", "anyio==4.6.2", "sniffio==1.3.1"),
    },
    "aiohttp": {
        "3.8.6": ("aiohttp==3.8.6", "async-timeout==4.0.3", "charset-normalizer==3.4.4"),
        "3.9.5": ("aiohttp==3.9.5",),
        "3.10.11": ("aiohttp==3.10.11",),
        "3.12.15": ("aiohttp==3.12.15",),
    },
}
NPM = ("0.5.2", "0.7.0", "0.8.4", "0.10.3", "0.10.4", "0.11.3")
NODE = ("16.20.2", "18.20.8", "24.22.3")
GO = ("1.21.13", "1.23.12")
JAVA = {"11": "11.0.13.1", "21": "21.0.8.2", "25": "25.0.2.1"}
