//! `clickhouse server` in place of libchdb, where the `clickhouse` program is installed.
//!
//! It is the real thing, with every part of the HTTP interface. It gets a config of its own, which opens nothing but the HTTP port on
//! the address that was asked for. This has been tested only as far as the config's text goes.

use super::server::Credentials;
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tokio::process::Command;

/// The variable that the password is handed over in: a config file would leave it on the disk.
const PASSWORD_VARIABLE: &str = "EMBEDDED_CLICKHOUSE_PASSWORD";

/// The `clickhouse` program on the `PATH`.
pub fn find_program(path: Option<OsString>) -> Option<PathBuf> {
    let directories: Vec<_> = std::env::split_paths(&path?).collect();
    directories
        .into_iter()
        .map(|directory| directory.join("clickhouse"))
        .find(|program| {
            fs::metadata(program)
                .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        })
}

/// Writes the config into `directory`, and returns the command that runs the server on it.
///
/// # Errors
/// When the directory cannot be written.
pub fn server_command(
    program: &Path,
    directory: &Path,
    listen: SocketAddr,
    credentials: &Credentials,
) -> io::Result<Command> {
    fs::create_dir_all(directory)?;
    let file = directory.join("config.xml");
    fs::write(&file, config(directory, listen, &credentials.user))?;
    // The server makes directories in it that only it should read.
    fs::set_permissions(directory, Permissions::from_mode(0o700))?;
    let mut command = Command::new(program);
    command
        .arg("server")
        .arg("--config-file")
        .arg(&file)
        .current_dir(directory);
    command.env(PASSWORD_VARIABLE, &credentials.password);
    Ok(command)
}

/// The least config that `clickhouse server` runs with.
fn config(directory: &Path, listen: SocketAddr, user: &str) -> String {
    let path = xml_text(&directory.display().to_string());
    let (host, port, user) = (listen.ip(), listen.port(), xml_text(user));
    format!(
        r#"<clickhouse>
    <logger><level>warning</level><console>1</console></logger>
    <listen_host>{host}</listen_host>
    <http_port>{port}</http_port>
    <path>{path}/</path>
    <tmp_path>{path}/tmp/</tmp_path>
    <user_files_path>{path}/user_files/</user_files_path>
    <format_schema_path>{path}/format_schemas/</format_schema_path>
    <mark_cache_size>67108864</mark_cache_size>
    <max_server_memory_usage_to_ram_ratio>0.5</max_server_memory_usage_to_ram_ratio>
    <profiles><default/></profiles>
    <quotas><default/></quotas>
    <users>
        <{USER_ELEMENT}>
            <password from_env="{PASSWORD_VARIABLE}"/>
            <networks><ip>::1</ip><ip>127.0.0.1</ip></networks>
            <profile>default</profile>
            <quota>default</quota>
        </{USER_ELEMENT}>
    </users>
</clickhouse>
"#,
        USER_ELEMENT = user,
    )
}

fn xml_text(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_opens_only_http_on_the_address_and_holds_no_password() {
        let directory = std::env::temp_dir().join(format!("gateway-official-{}", std::process::id()));
        let credentials = Credentials {
            user: "gateway".into(),
            password: "hunter2".into(),
        };
        let listen = "127.0.0.1:8124".parse().unwrap();
        let command =
            server_command(Path::new("/usr/bin/clickhouse"), &directory, listen, &credentials).unwrap();
        let text = fs::read_to_string(directory.join("config.xml")).unwrap();
        for line in [
            "<listen_host>127.0.0.1</listen_host>",
            "<http_port>8124</http_port>",
            "<gateway>",
            "</gateway>",
        ] {
            assert!(text.contains(line), "no {line} in {text}");
        }
        assert!(
            text.contains(&format!("<path>{}/</path>", directory.display())),
            "{text}"
        );
        for other in ["tcp_port", "mysql_port", "interserver_http_port", "hunter2"] {
            assert!(!text.contains(other), "{other} in {text}");
        }
        let environment: Vec<_> = command.as_std().get_envs().collect();
        assert_eq!(
            environment,
            [(PASSWORD_VARIABLE.as_ref(), Some("hunter2".as_ref()))]
        );
        fs::remove_dir_all(directory).unwrap();
        assert_eq!(xml_text("a&<b>"), "a&amp;&lt;b&gt;");
    }

    #[test]
    fn only_a_program_on_the_path_is_taken() {
        assert_eq!(find_program(None), None);
        assert_eq!(find_program(Some("/no/such/directory:/dev".into())), None);
    }
}
