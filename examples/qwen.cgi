#!/bin/sh
# For web servers that speak CGI only: copy it to their cgi-bin, and the API is at /cgi-bin/qwen.cgi/v1/...
# Apache passes the Authorization header on only with `CGIPassAuth On`.
# No "$@" here: some servers make arguments of a query string.
exec /opt/qwen-fast/bin/qwen-fast cgi --connect unix:/run/qwen-fast/8000/fastcgi.sock
