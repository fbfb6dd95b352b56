# Two images for linux/amd64 and linux/arm64; docs/docker.md says how to build and use them.
#   runtime  `compress bench` on a board: Python, numpy, onnxruntime, LiteRT; no torch, no shell, no root
#   full     `compress`, training and all
#
# BASE is Debian bookworm, whose Python is 3.11; DIGEST pins it: --build-arg DIGEST=@sha256:...
ARG BASE=docker.io/library/debian:bookworm-slim
ARG DIGEST=

# ------------------------------------------------------------------------------------------------------------- parts
# Collects the runtime image's files on the build machine's own architecture: Debian's packages are unpacked, not
# installed, and pip takes wheels of the other platform, so that nothing of the target runs and nothing is emulated.
FROM --platform=$BUILDPLATFORM ${BASE}${DIGEST} AS parts
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/*

ARG TARGETARCH
WORKDIR /debs
# A Python and what its modules in use link to; the system around it is left out.
# hadolint ignore=DL3008
RUN dpkg --add-architecture "$TARGETARCH" \
    && apt-get update \
    && set -- base-files libbz2-1.0 libc6 libexpat1 libffi8 libgcc-s1 liblzma5 libpython3.11-minimal \
        libpython3.11-stdlib libssl3 libstdc++6 libuuid1 python3.11-minimal zlib1g \
    && for package; do shift && set -- "$@" "$package:$TARGETARCH"; done \
    && apt-get download "$@" \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /python
RUN mkdir -p usr/bin usr/lib usr/lib64 usr/sbin models tmp var/lib/dpkg/status.d \
    && ln -s usr/bin usr/lib usr/lib64 usr/sbin . \
    && chmod 1777 tmp \
    && for deb in /debs/*.deb; do \
        dpkg-deb --fsys-tarfile "$deb" > /debs/tree.tar \
            && tar --extract --keep-directory-symlink --file /debs/tree.tar \
            && dpkg-deb --field "$deb" > "var/lib/dpkg/status.d/$(dpkg-deb --field "$deb" Package)" || exit 1; \
    done \
    && ln -s python3.11 usr/bin/python3 \
    && printf '%s:/usr/sbin/nologin\n' root:x:0:0:root:/root compress:x:65532:65532::/models > etc/passwd \
    && printf '%s:\n' root:x:0 compress:x:65532 > etc/group \
    && find usr/share/doc -type f ! -name copyright -delete \
    && rm -r usr/lib/*/gconv usr/share/info usr/share/lintian usr/share/man usr/lib/python3.11/pydoc_data \
    && find usr/share -xtype l -delete \
    && find usr/share -type d -empty -delete \
    && printf '#!/usr/bin/python3\nfrom compress.cli import main\n\nmain()\n' > usr/bin/compress \
    && chmod 755 usr/bin/compress

# One folder for each layer of the image. The runtimes name dependencies (protobuf, sympy, flatbuffers, tqdm, ...) that
# only their converters import: they come without; the command line comes with all it names.
COPY constraints.txt /
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=pip_cert,target=/run/pip_cert \
    case "$TARGETARCH" in arm64) arch=aarch64 ;; amd64) arch=x86_64 ;; *) echo "no wheels for $TARGETARCH"; exit 1 ;; esac \
    && wheels() { python3 -m pip install --no-cache-dir --no-compile --constraint /constraints.txt --only-binary :all: \
        --python-version 3.11 --implementation cp --platform "manylinux_2_28_$arch" --platform "manylinux_2_27_$arch" \
        --platform "manylinux_2_17_$arch" --platform "manylinux2014_$arch" --target "$@"; } \
    && wheels /packages/numpy --no-deps numpy \
    && wheels /packages/onnxruntime --no-deps onnxruntime \
    && wheels /packages/litert --no-deps ai-edge-litert \
    && wheels /packages/cli typer rich \
    && rm -rf /packages/*/bin

# What no inference reads: tests, headers, stubs, converters, the C library that onnxruntime's Python module does not
# link to, LiteRT's GPU delegate. No file that is left is changed.
WORKDIR /packages
RUN find . -type d \( -name tests -o -name include \) -prune -exec rm -r {} + \
    && find . -type f \( -name '*.pyi' -o -name '*.a' -o -name '*_tests.*.so' -o -name '_simd.*.so' \) -delete \
    && for name in distutils f2py; do rm -r "numpy/numpy/$name"; done \
    && for name in backend datasets quantization tools transformers; do rm -r "onnxruntime/onnxruntime/$name"; done \
    && for name in aot tflite tools; do rm -r "litert/ai_edge_litert/$name"; done \
    && rm onnxruntime/onnxruntime/capi/libonnxruntime.so.* \
        litert/ai_edge_litert/libLiteRtWebGpuAccelerator.so litert/ai_edge_litert/*_pb2.py

# Bytecode that is valid by itself, not by the time of its source: a read-only image cannot write its own.
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /python/usr/lib/python3.11 /packages
COPY compress /packages/compress/compress
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /packages/compress

# ----------------------------------------------------------------------------------------------------------- runtime
FROM scratch AS runtime
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="compress bench" \
      org.opencontainers.image.description="Times and checks exported networks on the board it runs on." \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=parts /python /
COPY --from=parts /packages/numpy /usr/local/lib/python3.11/dist-packages
COPY --from=parts /packages/onnxruntime /usr/local/lib/python3.11/dist-packages
COPY --from=parts /packages/litert /usr/local/lib/python3.11/dist-packages
COPY --from=parts /packages/cli /usr/local/lib/python3.11/dist-packages
COPY --from=parts /packages/compress /usr/local/lib/python3.11/dist-packages
ENV HOME=/tmp LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /models
ENTRYPOINT ["compress", "bench"]
CMD ["--help"]

# -------------------------------------------------------------------------------------------------------------- full
# pip of the target's own Python: dependencies of torch differ by architecture, and only it reads their conditions right.
FROM ${BASE}${DIGEST} AS training
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=pip_cert,target=/run/pip_cert \
    python3 -m venv /opt/compress \
    && /opt/compress/bin/pip install --no-cache-dir --constraint /source/constraints.txt /source \
    && /opt/compress/bin/pip uninstall --yes pip

FROM ${BASE}${DIGEST} AS full
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="compress" \
      org.opencontainers.image.description="Shrinks a PyTorch vision network for an ARM board and proves that it did." \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
# ssh reaches boards: target: ssh://...
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client python3-minimal libpython3-stdlib \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 65532 --user-group --create-home compress
COPY --from=training /opt/compress /opt/compress
ENV LANG=C.UTF-8 PATH=/opt/compress/bin:$PATH
USER 65532:65532
WORKDIR /work
ENTRYPOINT ["compress"]
