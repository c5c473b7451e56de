# The dependencies are in a layer that changes only with the lock file, Stowgate is in a small one
# after it. Nothing needs a compiler, so there is one build stage.
FROM python:3.11-slim-bookworm AS installed

RUN groupadd --gid 10001 stowgate \
    && useradd --uid 10001 --gid stowgate --no-create-home --home-dir /data \
        --shell /usr/sbin/nologin stowgate \
    && install --directory --owner=stowgate --group=stowgate --mode=0750 /data

RUN --mount=type=bind,source=requirements.lock,target=/requirements.lock \
    pip install --no-cache-dir --root-user-action=ignore \
        --require-hashes --requirement /requirements.lock

RUN --mount=type=bind,target=/source,rw \
    pip install --no-cache-dir --root-user-action=ignore --no-deps /source

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

USER 10001:10001


# A test double of the MONAI Deploy Workflow Manager, for demonstrations and tests.
FROM installed AS workflow-manager-double

COPY tests/workflow_manager_double.py /opt/

ENTRYPOINT ["python", "/opt/workflow_manager_double.py"]


FROM installed AS stowgate

# Other machines can reach this address, so the API starts only with STOWGATE_AUTH, or with
# STOWGATE_ALLOW_ANYONE=true.
ENV STOWGATE_DATA=/data \
    STOWGATE_LISTEN=0.0.0.0:8080 \
    STOWGATE_WORKER_LISTEN=0.0.0.0:8081

VOLUME ["/data"]
EXPOSE 8080 8081

# The check does not verify the certificate, because its name does not matter for health. For
# `stowgate worker`, set STOWGATE_LISTEN to the address of STOWGATE_WORKER_LISTEN.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client as h, os, ssl; e = os.environ; port = int(e['STOWGATE_LISTEN'].rpartition(':')[2]); tls = {'STOWGATE_TLS_CERTIFICATE', 'STOWGATE_TLS_CERTIFICATE_FILE'} & {*e}; probe = h.HTTPSConnection('127.0.0.1', port, timeout=4, context=ssl._create_unverified_context()) if tls else h.HTTPConnection('127.0.0.1', port, timeout=4); probe.request('GET', '/health/live'); raise SystemExit(probe.getresponse().status != 200)"]

STOPSIGNAL SIGTERM

ENTRYPOINT ["stowgate"]
CMD ["run"]
