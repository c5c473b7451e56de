RESERVED = frozenset({"dicomweb", "payloads", "config", "health", "metrics", "openapi.json"})
