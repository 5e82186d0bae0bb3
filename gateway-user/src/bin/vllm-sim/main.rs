//! vllm-sim: stands in for a vLLM OpenAI server.
//!
//! It answers the same routes with the same bytes (texts aside), spends time as a continuous-batching engine does,
//! and counts at `/metrics` exactly what its engine did, so that what a gateway attributes can be compared with the
//! truth. It loads no model: prompts are counted by a pseudo tokenizer and answers are made up from the seed.
//! Left out: audio, LoRA loading at run time, `stop` strings, structured output, and everything behind a GPU.

mod body;
mod engine;
mod faults;
mod http;
mod metrics;
mod options;
mod pooling;
mod prompts;
mod request;
mod router;
mod shapes;
mod sockets;
mod tools;

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use clap::Parser as _;
use tokio::net::{TcpListener, TcpSocket};
use vllm_gateway::sim::tokens;
use vllm_gateway::stop;

use crate::engine::{Engine, Limits, RequestLog, Scheduler, StepCost};
use crate::options::Options;
use crate::router::Site;

/// Connections that may wait to be accepted (uvicorn's default).
const BACKLOG: u32 = 2048;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    options.check().map_err(|problem| anyhow!(problem))?;
    let mut builder = match options.threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if options.threads > 1 {
        builder.worker_threads(options.threads.into());
    }
    builder
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(run(options))
}

async fn run(options: Options) -> anyhow::Result<()> {
    let stopped = stop::signalled().context("cannot listen for SIGTERM and SIGINT")?;
    let socket = bind(&options)?;
    let address = socket
        .local_addr()
        .context("cannot read the address that was bound")?;
    let engine = start_engine(&options);
    let load_time = options.load_time;
    let site = Arc::new(Site::new(options, engine));
    let server = match load_time {
        None => tokio::spawn(http::serve(listen(socket, address)?, site)),
        Some(load_time) => tokio::spawn(async move {
            tokio::time::sleep(load_time).await;
            match listen(socket, address) {
                Ok(listener) => http::serve(listener, site).await,
                Err(error) => eprintln!("vllm-sim: {error:#}"),
            }
        }),
    };
    // Tests wait for this line, so it must leave at once.
    let mut stdout = std::io::stdout();
    writeln!(stdout, "listening on http://{address}")?;
    stdout.flush()?;
    stopped.await;
    server.abort();
    Ok(())
}

fn bind(options: &Options) -> anyhow::Result<TcpSocket> {
    let address = options.listen;
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address).with_context(|| taken(address))?;
    Ok(socket)
}

fn listen(socket: TcpSocket, address: SocketAddr) -> anyhow::Result<TcpListener> {
    socket.listen(BACKLOG).with_context(|| taken(address))
}

fn taken(address: SocketAddr) -> String {
    format!("cannot listen on {address}: choose another with --listen (port 0: any free one)")
}

fn start_engine(options: &Options) -> Engine {
    let limits = Limits {
        max_num_seqs: options.max_num_seqs as usize,
        max_num_batched_tokens: options.max_num_batched_tokens,
        kv_blocks: options.kv_blocks,
        block_size: options.block_size,
        prefix_cache: !options.no_prefix_cache,
        lockstep: options.instant,
    };
    let cost = (!options.instant).then_some(StepCost {
        base_us: options.step_base_us,
        prefill_us_per_token: options.prefill_us_per_token,
        decode_us_per_seq: options.decode_us_per_seq,
        read_us_per_token: options.read_us_per_token,
    });
    let log = options.introspect.then(RequestLog::default);
    Engine::start(Scheduler::new(limits, log), cost, options.max_num_queued_reqs)
}
