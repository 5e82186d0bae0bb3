{{- define "vllm-gateway.name" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- /* The longest thing that is named after it, a pod of the set, has 63 characters at most. */ -}}
{{- $name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "vllm-gateway.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vllm-gateway.labels" -}}
{{ include "vllm-gateway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "vllm-gateway.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What the environment adds to the config: where this instance is, and secrets. */}}
{{- define "vllm-gateway.environment" -}}
- name: GATEWAY_ADMIN_ADDR
  value: "0.0.0.0:9464"
- name: SPOOL_DIR
  value: /var/lib/vllm-gateway/spool
{{- with .Values.secretName }}
{{- range $variable, $key := dict "GATEWAY_SECRET" "gateway-secret" "GATEWAY_ADMIN_TOKEN" "admin-token" "CLICKHOUSE_USERNAME" "clickhouse-username" "CLICKHOUSE_PASSWORD" "clickhouse-password" }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.secretName }}
      key: {{ $key }}
      # A tap that does not share it would book the gateways' requests a second time.
      optional: {{ not (and $.Values.tap.enabled (eq $key "gateway-secret")) }}
{{- end }}
{{- end }}
{{- end }}

{{/* The process serves; whether it should get traffic. An upstream that is down is no reason to restart a gateway. */}}
{{- define "vllm-gateway.probes" -}}
startupProbe:
  httpGet: {path: /health, port: admin}
  periodSeconds: 1
  failureThreshold: 30
livenessProbe:
  httpGet: {path: /health, port: admin}
  periodSeconds: 10
  timeoutSeconds: 3
readinessProbe:
  httpGet: {path: /ready, port: admin}
  periodSeconds: 5
  timeoutSeconds: 3
{{- end }}
