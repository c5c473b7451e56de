"""The paths of health and metrics, in a module that may be imported before prometheus_client."""

HEALTH_PATHS = {
    "health.live": "/health/live",
    "health.ready": "/health/ready",
    "health.startup": "/health/startup",
    "health.metrics": "/metrics",
}
"""The paths of the views by endpoint."""
