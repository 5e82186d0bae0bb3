// What a dashboard must be, in Grafana's own words. `cargo xtask check-dashboards` writes each dashboard out as a module that claims these types,
// and has the compiler prove it: a misspelt or outgrown option is an error, which Grafana itself would pass over in silence.
import type { Dashboard, FieldConfig, FieldConfigSource, Panel, RowPanel } from '@grafana/schema';
import type * as heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as stateTimeline from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

/** A type as JSON has it: values of enumerations are their strings. */
type Json<T> = T extends string
  ? `${T}`
  : T extends readonly (infer Item)[]
    ? Json<Item>[]
    : T extends object
      ? { [Key in keyof T]: Json<T[Key]> }
      : T;

/** A panel of one kind. Grafana's own type of a panel leaves options and custom fields open, since plugins may have any; these may not. */
type Kind<Type extends string, Options, Custom> = Json<
  Omit<Panel, 'fieldConfig' | 'options' | 'type'> & {
    type: Type;
    options: Options;
    fieldConfig: Omit<FieldConfigSource, 'defaults'> & { defaults: Omit<FieldConfig, 'custom'> & { custom?: Partial<Custom> } };
  }
>;

export type AnyDashboard = Json<Omit<Dashboard, 'panels'>> & { panels: (AnyPanel | Json<RowPanel>)[] };
export type AnyPanel =
  | Kind<'heatmap', heatmap.Options, heatmap.FieldConfig>
  | Kind<'stat', stat.Options, Record<never, never>>
  | Kind<'state-timeline', stateTimeline.Options, stateTimeline.FieldConfig>
  | Kind<'table', table.Options, table.FieldConfig>
  | Kind<'timeseries', timeseries.Options, timeseries.FieldConfig>;

// The check can fail: each of these is wrong, and the compiler complains of a line that it finds nothing wrong with.
const title = 'A panel';
const fieldConfig = { defaults: {}, overrides: [] };
const legend = { calcs: [] as string[], displayMode: 'list' as const, placement: 'bottom' as const, showLegend: true };
const tooltip = { mode: 'multi', sort: 'desc' } as const;
export const right: AnyPanel = { title, type: 'timeseries', fieldConfig, options: { legend, tooltip } };
export const wrong: AnyPanel[] = [
  // @ts-expect-error No such kind.
  { title, type: 'graph', fieldConfig, options: {} },
  // @ts-expect-error No such option.
  { title, type: 'timeseries', fieldConfig, options: { legend, tooltip, tooltips: tooltip } },
  // @ts-expect-error An option is missing.
  { title, type: 'timeseries', fieldConfig, options: { legend } },
  // @ts-expect-error No such placement.
  { title, type: 'timeseries', fieldConfig, options: { legend: { ...legend, placement: 'left' }, tooltip } },
  // @ts-expect-error No such field.
  { title, type: 'timeseries', fieldConfig: { defaults: { units: 's' }, overrides: [] }, options: { legend, tooltip } },
  // @ts-expect-error No such custom field.
  { title, type: 'timeseries', fieldConfig: { defaults: { custom: { drawstyle: 'line' } }, overrides: [] }, options: { legend, tooltip } },
];
export const dashboards: AnyDashboard[] = [
  { schemaVersion: 42, panels: [right] },
  // @ts-expect-error No such member.
  { schemaVersion: 42, panels: [right], panel: [] },
  // @ts-expect-error No such option, within a dashboard.
  { schemaVersion: 42, panels: [{ title, type: 'timeseries', fieldConfig, options: { legend, tooltip, tooltips: tooltip } }] },
];
