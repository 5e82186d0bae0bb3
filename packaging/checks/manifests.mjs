// Sorts rendered manifests by who knows their shape. Kubernetes' own kinds go into one file, for its schemas; those of the Prometheus operator are
// held against its types: their values here, their fields by the compiler, which alone minds those that do not exist.
//
// usage: node manifests.mjs RENDERED.yaml CORE.yaml CUSTOM.ts

import { readFileSync, writeFileSync } from 'node:fs';
import * as operator from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';
import yaml from 'js-yaml';

const [rendered, core, custom] = process.argv.slice(2);
const all = yaml.loadAll(readFileSync(rendered, 'utf8')).filter((manifest) => manifest !== null);
const isCustom = (manifest) => manifest.apiVersion === 'monitoring.coreos.com/v1';
const [others, own] = [all.filter(isCustom), all.filter((manifest) => !isCustom(manifest))];
if (own.length === 0) {
  throw new Error(`${rendered} holds no manifest`);
}
for (const manifest of others) {
  new operator[manifest.kind](manifest).validate();
}
writeFileSync(core, own.map((manifest) => `---\n${yaml.dump(manifest)}`).join(''));
const claims = others.map(
  (manifest, index) => `export const manifest${index}: operator.I${manifest.kind} = ${JSON.stringify(manifest, null, 2)};\n`,
);
const types = "import type * as operator from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';\n";
writeFileSync(custom, types + claims.join(''));
